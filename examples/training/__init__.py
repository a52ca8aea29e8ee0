"""What train.py, evaluate.py and predict.py share: options, data, model, training loop, records, checkpoints."""
