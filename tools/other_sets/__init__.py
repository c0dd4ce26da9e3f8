"""Parts of tools/test_originals.py and tools/test_torch.py."""
