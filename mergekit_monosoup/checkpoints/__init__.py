"""Reading checkpoints: tensor names, file headers, and models tensor by tensor."""
