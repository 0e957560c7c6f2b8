"""Images with captions, from wherever they lie, and pictures of any kind as RGB."""
