"""Video classification on reversible trunks: data, training and prediction for Kinetics."""
