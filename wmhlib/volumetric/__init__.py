"""Networks of whole volumes: lesions of any contrast on a grid of cubic voxels."""
