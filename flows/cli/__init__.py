"""The command line: `eclectus`, one file a group of commands."""
