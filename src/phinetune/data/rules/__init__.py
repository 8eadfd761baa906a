"""What may be wrong with examples that can be read, one module for each family. No files, no tokens."""
