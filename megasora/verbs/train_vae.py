"""Trains the causal video VAE on the shards: reconstruction and KL, images and clips mixed. Writes it to encode.vae.

example:
  megasora train-vae --config configs/demo.yaml --train_vae.steps=500 --encode.vae=data/vae
"""
