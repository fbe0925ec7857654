"""What do several devices exchange, and do they give the numbers of one?"""
