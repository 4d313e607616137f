"""Files that survive: written beside and renamed, lines, arrays, the lock."""
