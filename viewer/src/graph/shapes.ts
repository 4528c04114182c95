/** The WebGL program of nodes: five shapes by their signed distance, with a ring around what is pinned or chosen. */
import { NodeProgram, type ProgramInfo } from "sigma/rendering";
import type { NodeDisplayData, RenderParams } from "sigma/types";
import { floatColor } from "sigma/utils";
import type { Kind } from "./parse";

export const SHAPES: Record<Kind, number> = { feature: 0, token: 1, error: 2, bias: 3, rest: 3, logit: 4 };
export interface ShapedData extends NodeDisplayData {
  shape: number;
  ring: string;
  /** Thickness of the ring, as a share of the radius. */
  ringWidth: number;
}

const VERTEX = /* glsl */ `
attribute vec4 a_id;
attribute vec4 a_color;
attribute vec4 a_ring;
attribute vec2 a_position;
attribute float a_size;
attribute float a_shape;
attribute float a_ringWidth;
attribute vec2 a_corner;
uniform mat3 u_matrix;
uniform float u_sizeRatio;
uniform float u_correctionRatio;
varying vec4 v_color;
varying vec4 v_ring;
varying vec2 v_point;
varying float v_shape;
varying float v_ringWidth;
varying float v_pixel;
const float bias = 255.0 / 254.0;
void main() {
  float size = a_size * u_correctionRatio / u_sizeRatio * 4.0;
  vec2 position = a_position + size * 1.3 * a_corner;
  gl_Position = vec4((u_matrix * vec3(position, 1)).xy, 0, 1);
  v_point = 1.3 * a_corner;
  v_shape = a_shape;
  v_ringWidth = a_ringWidth;
  v_pixel = u_correctionRatio * 2.0 / size;
  v_ring = a_ring;
  v_ring.a *= bias;
  #ifdef PICKING_MODE
  v_color = a_id;
  #else
  v_color = a_color;
  #endif
  v_color.a *= bias;
}`;

const FRAGMENT = /* glsl */ `
precision highp float;
varying vec4 v_color;
varying vec4 v_ring;
varying vec2 v_point;
varying float v_shape;
varying float v_ringWidth;
varying float v_pixel;
void main() {
  vec2 p = v_point;
  vec2 q = abs(p);
  float d;
  if (v_shape < 0.5) d = length(p) - 0.5;
  else if (v_shape < 1.5) d = max(q.x, q.y) - 0.44;
  else if (v_shape < 2.5) d = (q.x + q.y - 0.6) * 0.7071;
  else if (v_shape < 3.5) d = max(q.x * 0.866 + p.y * 0.5, -p.y) - 0.28;
  else { vec2 c = max(q - vec2(0.26), 0.0); d = length(c) - 0.24; }
  #ifdef PICKING_MODE
  if (d > 0.1) discard;
  gl_FragColor = v_color;
  #else
  float fade = clamp(v_pixel, 0.001, 0.5);
  float outer = 1.0 - smoothstep(v_ringWidth * 0.5 - fade, v_ringWidth * 0.5 + fade, d);
  float inner = 1.0 - smoothstep(-v_ringWidth * 0.5 - fade, -v_ringWidth * 0.5 + fade, d);
  vec4 color = mix(v_ring, v_color, inner);
  float alpha = color.a * outer;
  gl_FragColor = vec4(color.rgb * alpha, alpha);
  #endif
}`;

const { FLOAT, UNSIGNED_BYTE, TRIANGLE_STRIP } = WebGLRenderingContext;

export class ShapeProgram extends NodeProgram<"u_matrix" | "u_sizeRatio" | "u_correctionRatio"> {
  getDefinition() {
    return {
      VERTICES: 4,
      VERTEX_SHADER_SOURCE: VERTEX,
      FRAGMENT_SHADER_SOURCE: FRAGMENT,
      METHOD: TRIANGLE_STRIP as 5,
      UNIFORMS: ["u_matrix", "u_sizeRatio", "u_correctionRatio"] as const,
      ATTRIBUTES: [
        { name: "a_position", size: 2, type: FLOAT },
        { name: "a_size", size: 1, type: FLOAT },
        { name: "a_shape", size: 1, type: FLOAT },
        { name: "a_ringWidth", size: 1, type: FLOAT },
        { name: "a_color", size: 4, type: UNSIGNED_BYTE, normalized: true },
        { name: "a_ring", size: 4, type: UNSIGNED_BYTE, normalized: true },
        { name: "a_id", size: 4, type: UNSIGNED_BYTE, normalized: true },
      ],
      CONSTANT_ATTRIBUTES: [{ name: "a_corner", size: 2, type: FLOAT }],
      CONSTANT_DATA: [[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]],
    };
  }

  processVisibleItem(id: number, start: number, data: NodeDisplayData): void {
    const { shape, ring, ringWidth } = data as ShapedData;
    const { array } = this;
    array[start++] = data.x;
    array[start++] = data.y;
    array[start++] = data.size;
    array[start++] = shape;
    array[start++] = ringWidth;
    array[start++] = floatColor(data.color);
    array[start++] = floatColor(ring);
    array[start++] = id;
  }

  setUniforms({ sizeRatio, correctionRatio, matrix }: RenderParams, { gl, uniformLocations }: ProgramInfo<"u_matrix" | "u_sizeRatio" | "u_correctionRatio">): void {
    gl.uniform1f(uniformLocations.u_sizeRatio, sizeRatio);
    gl.uniform1f(uniformLocations.u_correctionRatio, correctionRatio);
    gl.uniformMatrix3fv(uniformLocations.u_matrix, false, matrix);
  }
}
