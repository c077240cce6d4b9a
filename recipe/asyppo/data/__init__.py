"""From published problem sets to verl's rows: reading, decontamination, writing."""
