"""What does an n-gram memory of a language model lose in INT4, and what does it save?"""
