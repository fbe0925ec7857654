"""Which row belongs to which raw id: hashes of raw ids, and the rows that they earn."""
