"""What training a GAN needs beyond phases: losses and penalties, augmentation of both players' images, FID and KID."""
