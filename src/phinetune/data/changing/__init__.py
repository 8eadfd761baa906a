"""New files from old ones: cleaned, split, converted, sampled, merged. The input is never written to."""
