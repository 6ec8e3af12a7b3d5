"""Which architectures of transformers are served rightly: tiny random models, real adapters, held against PEFT.

python -m tests.survey             every architecture; writes docs/architectures.md
python -m tests.survey llama opt   these alone; prints what was found
"""
