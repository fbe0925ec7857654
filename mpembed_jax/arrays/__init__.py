"""Array operations that the package builds on: gathers, scatters, chunked loops, loop carries."""
