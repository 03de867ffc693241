"""The book. A folder is a part, a file is a chapter: one operator, from its equation to its fastest form."""
