"""Run folders as one page: curves with bands over seeds, settings that differ, a verdict, and what the critics see."""
