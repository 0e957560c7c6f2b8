"""The page as a Hugging Face Space, or by itself: `python app.py`. docs/UI.md says what to upload."""

from moe_sampler.ui import serve

serve()
