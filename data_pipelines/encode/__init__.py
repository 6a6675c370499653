"""Shards to latent shards: decoded ahead, encoded in batches, tied to the encoders."""
