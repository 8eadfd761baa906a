"""Private data and secrets in text: finding and replacing them. No files, no rows."""
