"""From a model to others: what its files say of themselves, its card, and the way to the Hugging Face hub."""
