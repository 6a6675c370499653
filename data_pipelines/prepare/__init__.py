"""Raw files to shards: sources, captions, clips, measures, duplicates."""
