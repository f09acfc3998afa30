"""What a run needs of a machine that is not at hand, before it is paid for.

`chips`: accelerators and topologies. `stages`: the functions that training and decoding run, with
abstract arguments. `compiled`: what the chips' own compilers say of them. `gpus`: GPUs as theirs
wants them described. `formula`: the same by arithmetic. `hlo`: what a compiled program sends.
`kernels`: what that of a GPU moves and multiplies. `plan`: all of it, as one record with advice.
"""
