"""The AsyPPO recipe: entry point and scripts, data and reward, evaluation, reports and planner, toys and the study."""
