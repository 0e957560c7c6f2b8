"""From any source to a model: folders, files and the hub, strictly, and never executing what they hold."""
