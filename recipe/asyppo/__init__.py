"""The AsyPPO recipe: an explicit entry point, its configuration, and a toy task that trains on a laptop."""
