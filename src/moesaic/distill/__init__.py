"""The distillation laboratory: is there a sparse mixture of experts inside this FFN?"""
