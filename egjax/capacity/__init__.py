"""What a run needs of a machine that is not at hand, before it is paid for.

`chips`: accelerators and topologies. `stages`: the functions that training and decoding run, with
abstract arguments. `compiled`: what the real TPU compiler says of them. `formula`: the same by
arithmetic. `hlo`: what a compiled program sends. `plan`: all of it, as one record with advice.
"""
