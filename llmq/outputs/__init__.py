"""What `--format` asks for: the layout that blocks are staged in, the names and the layers that it is about."""
