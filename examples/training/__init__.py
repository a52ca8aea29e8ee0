"""The training tool behind train.py, evaluate.py and predict.py."""
