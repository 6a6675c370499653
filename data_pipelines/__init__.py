"""From raw videos to the batches of a run: shards with an index, buckets, order, balance. Imports nothing of megasora."""
