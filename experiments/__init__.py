"""The experiments of metaopt. README.md is their index."""
