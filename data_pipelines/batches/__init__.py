"""Shards to the batches of a run: buckets, order, balance, packed rows."""
