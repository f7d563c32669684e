"""Videos: finding, scanning, decoding, clips, loaders."""
