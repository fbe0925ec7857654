"""Which row belongs to which raw id or n-gram: hashes of them, and the rows that raw ids earn."""
