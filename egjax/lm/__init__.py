"""Language models: a Llama as a pure function, decoding of one or several, Hugging Face files.

Modules: `config`, `params` (the table of tensors), `model`, `cache`, `ensemble` (several models
read as one), `generate`, `score`, `ratio` (decoding from the behaviour ratio), `speculate` (the
same tokens in fewer readings), `beam`, `stops` (stop strings), `constrain` (what a grammar allows),
`lora` (low-rank adapters), `hf` and `peft` (checkpoints and adapters in and out), `tokenizer`,
`nnx` (the same model for users of Flax).
`hf`, `peft` and `tokenizer` need the extra `lm`; the others the base install.
"""
