"""Operations on the state of a stack of tables: training, pooling, evaluation, statistics."""
