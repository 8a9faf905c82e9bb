"""What transformers 5.23 gets wrong, shown, and what mnemon does instead; one file per defect."""
