"""From COCO files to shards, to a planned stream, to a trained and evaluated model."""
