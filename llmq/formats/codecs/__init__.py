"""What several formats share: how codes become words and bytes, and checks of what a file declares and holds."""
