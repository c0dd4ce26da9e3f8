"""Parts of tools/test_originals.py."""
