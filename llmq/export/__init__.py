"""From one format to another, and from committed blocks to finished folders: the same codes in other files."""
