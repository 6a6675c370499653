"""What a sample is, raw or latent, and how one is opened, here or in a worker process."""
