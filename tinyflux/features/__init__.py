"""What the experts teach: features of a sample's own latent, encoders, and the cache that keeps both."""
