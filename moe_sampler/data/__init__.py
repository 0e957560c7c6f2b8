"""Images with captions, from wherever they lie."""
