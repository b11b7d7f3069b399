"""What a sparse layer is: masks, layers, SLoRB, and the selection of layers in a model."""
