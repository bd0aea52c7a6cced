"""What the theory says of a model, measured on it: python -m fewshot.evidence checkpoint=PATH"""
