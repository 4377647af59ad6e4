"""The steps: artifacts and settings in, one artifact out. One file each, found by its verb."""
