"""Detect by running a model how its layers are connected: inputs that layers share, places to fold scales into."""
