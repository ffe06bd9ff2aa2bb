"""Networks: the ADM U-Net of the published teachers, its layers, and the predictor x̂_0 with λ(t)."""
