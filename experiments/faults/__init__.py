"""Is anything lost when runs are killed, files damaged, disks full, ids and gradients mad?"""
